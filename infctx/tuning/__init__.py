"""What is trained when it is not everything."""
