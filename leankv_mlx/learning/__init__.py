"""What is learned of a model on the user's own machine: masks and bases of keys."""
