"""What each request of the API does."""
