"""Auditing synthetic datasets: whether they copy, and how true to life and how varied they are."""
