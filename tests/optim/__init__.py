"""Optimizers against torch's, schedules against their closed form."""
