"""What a state or a model's coverage has to say."""
