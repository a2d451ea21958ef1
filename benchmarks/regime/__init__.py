"""The regime of the paper: compute that approaches and exceeds the number of users, on text by user."""
