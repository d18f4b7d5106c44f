"""Pictures: heat maps and curves as PNG. numpy draws them and zlib packs them; a plotting library would be the largest dependency of all
for two kinds of picture.
"""
