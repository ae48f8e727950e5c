"""Teleports and null spaces inside other people's training loops.

`teleport.integrations.lightning`, `teleport.integrations.transformers` and
`teleport.integrations.avalanche` each need the library they are named after, an extra of this
package; nothing else imports them.
"""
