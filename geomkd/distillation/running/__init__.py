"""What keeps a long run alive and is no part of the method."""
