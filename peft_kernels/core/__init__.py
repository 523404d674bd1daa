"""What the methods share: backend selection, dropout, tile tables, checks."""
