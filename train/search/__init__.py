"""Search over reasoning steps: a tree a question, thousands of trees through one engine."""
