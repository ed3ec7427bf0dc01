"""The page of ``tokprune verify --html``: one file that loads nothing, with the numbers of the result.

document  the page, from page.html and style.css
charts    FLOPs by segment and IPR by layer, as places in per cent of a picture as wide as the page lets it be
flips     samples whose answer changed, with pictures of the patches kept
"""
