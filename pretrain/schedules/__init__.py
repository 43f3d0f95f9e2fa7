"""Scheduled evaluation: entries that say what to evaluate and when, and the service that does it.

The files lie beside the runs, so that neither a service nor a machine that ends takes anything with it:

    STORAGE/schedules/  ENTRY.json       what is asked, and which due time was the last (`entries`)
                        history.jsonl    what was done, skipped and found (`pretrain.record.lines`)
                        outbox/          alerts that no server has taken yet (`webhooks`)
                        logs/ENTRY.log   output of the evaluations
"""
