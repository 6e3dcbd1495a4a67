"""What a notebook shows for cpgemm's objects: HTML with inline styles and SVG, no JavaScript.

Text and lines take the notebook's own colour, backgrounds stay transparent: a light and a dark
theme both do.  Classes call these modules from ``_repr_html_``, which imports them when something
is shown, so that no layer imports upwards.
"""
