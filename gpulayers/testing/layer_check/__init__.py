"""What ``check_layer`` tries on a layer, an axis a file; ``_subject`` runs the layer, ``_slopes`` and ``_words`` judge."""
