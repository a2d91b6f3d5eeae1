"""Callbacks: model, expressions, URLs and checks. They use neither requests nor stores."""
