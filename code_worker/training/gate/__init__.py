"""Decides whether a candidate replaces the champion."""
