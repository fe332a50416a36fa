"""The registry: versions, their files and cards, and the aliases that point at them."""
