"""Trains an encoder: views, objective, optimiser steps, and the process that runs them."""
