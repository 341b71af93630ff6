"""Long recordings cut into clips: windows, given segments, the table about them."""
