"""What is left of a frozen backbone where patches of an image are spoiled, or out of order."""
