"""The built-in heads: linear, kNN and one-class SVM."""
