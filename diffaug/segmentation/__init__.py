"""Segmentation networks of the field's libraries, trained on patches of cases.

`networks`, `cases`, `patches`, `training`, `prediction`, `scoring`.
"""
