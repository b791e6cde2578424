"""What several tests need; every helper is imported from here."""
