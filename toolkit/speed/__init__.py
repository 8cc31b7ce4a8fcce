"""Make a trained model faster: search where its tokens merge best, and recover what that costs."""
