"""instructblip."""
