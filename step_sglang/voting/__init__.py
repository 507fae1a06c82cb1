"""From finished traces to one answer: extraction, comparison, the vote, ending early."""
