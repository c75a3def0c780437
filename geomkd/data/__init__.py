"""What a user hands over, read in one way for scoring and for training."""
