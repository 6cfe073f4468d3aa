"""The parts of the page that `Report.write_html` writes: each gives a piece of HTML or SVG, escaped and complete."""
