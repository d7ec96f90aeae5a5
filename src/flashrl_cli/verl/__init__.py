"""What flashrl knows of verl 0.9.1; the only package that spells verl's keys, file layouts and metric names."""
