"""`remax report`: one HTML file that shows what a training did, alone or beside others."""
