"""The commands: each reads its options, runs one stage and says what was made."""
