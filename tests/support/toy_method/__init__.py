"""A method outside of the package: what a fourth method has to bring, and no more.

Its network keeps one canvas per class and level, and adds noise to it.
"""
