"""The paper's synthetic study of ULS against ELS: simulated, in closed form, and tuned."""
