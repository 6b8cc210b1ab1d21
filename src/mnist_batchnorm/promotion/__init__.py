"""Which version becomes champion, by which rules."""
