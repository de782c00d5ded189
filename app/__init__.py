"""leankv-chat: a chat that shows the memory it saves. Only this package knows textual."""
