"""From a file to batches of token ids. The way of the data, in reading order:

rows             what stands in a file, a folder, a sample or a hub data set, in one shape; the split; duplicates
columns          which column is the text, the label, the prompt
tasks            what is learnt from them, and the targets
load_data        all of that decided, for a run or for prediction
  decision_cache   what was decided about files, kept between runs
chat             prompts and conversations as the model reads them, and which tokens carry loss
encode           rows become token ids: encode_text, encode_tags, encode_language; what a tokenizer is asked: tokenizer
  examples         the ids, and a ledger of what became of each row
  token_cache      the ids, kept between runs
near_copies      which texts are near copies of one another
order            which rows make which step
batches          examples side by side, padded
retrieval        which texts stand nearest to a query: by words, or by vectors

disk_cache is the folder on the disk in which both caches keep what they hold.
"""
