"""An OpenAI-compatible server over one batch: ``reft-export serve``. Nothing else imports fastapi, uvicorn and prometheus_client."""
