"""What the tests share: tiny targets and data, plain statements of the mathematics, starts of trainings."""
