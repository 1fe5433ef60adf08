"""Images are downloaded, checked and stored."""
