"""One adapter into one model: its names fitted, its factors staged for the slots of each layer."""
