"""The command line of oirl: arguments to a call of one function; no logic of its own."""
