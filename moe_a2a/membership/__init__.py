"""Who is in the group: views that all members agree on, the store that they agree through, and the watchers that see
ranks die (DESIGN.md D5, D6, D8). docs/membership.md explains how the parts fit."""
