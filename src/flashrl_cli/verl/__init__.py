"""The only place that spells verl's keys, file layouts and metric names."""
