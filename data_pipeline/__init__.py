"""From raw text to verified token shards, without torch. This file imports nothing."""
