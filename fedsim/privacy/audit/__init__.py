"""Audits: lower bounds on ε from attacks. Evidence for or against a guarantee, never a proof of one."""
