"""For tools that look for this file; everything it could say stands in setup.cfg."""

from setuptools import setup

setup()
