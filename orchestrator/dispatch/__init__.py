"""The dispatcher: claims events as they fall due, delivers them, and writes down what happened."""
