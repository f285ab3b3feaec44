"""Commands of what judges: releases, heads, policies, and how good they are."""
