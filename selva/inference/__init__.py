"""From videos, features or words to sound; one or many, compared or not."""
