"""What is learned of a model on the user's own machine: masks of key channels."""
