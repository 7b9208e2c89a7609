"""Commands in an asyncio event loop."""
