"""The paper's questions and its reviewers' as runs, numbers, tables and pictures; ask your own here."""
