"""Layout arithmetic without torch: what each rank holds, sends and computes under a recipe's layout."""
