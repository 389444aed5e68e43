"""How good are influence scores? They are arrays here: this room knows neither models nor how scores are made."""
